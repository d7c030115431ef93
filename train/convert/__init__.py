"""Checkpoints to and from the layouts that other code reads: `python -m train.convert`.

`registry.py` lists the layouts, `mapping.py` says how a foreign tensor is made of native rows and back,
`tensor_files.py` reads and writes files tensor by tensor, `outward.py` and `inward.py` are the two directions,
`card.py` writes the model card. `remote/` holds the files that travel with an export so that transformers can load it.
"""
