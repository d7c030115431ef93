"""From bilingual text to training samples: sources, cleaning, tokenizer, shards, blank infilling, loader."""
