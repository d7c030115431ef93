"""Checkpoints: layout-free, pickle-free, whole or absent.

    step_00000050.partial/   written by all ranks, then renamed to
    step_00000050/           model/*.safetensors, optimizer/*.safetensors, trainer_state.json, config.yaml, tokenizer/,
                             manifest.json (last: files, bytes, checksums, layout)
    latest                   name of the newest whole one

`pieces.py` says how a tensor lies in the files, `staging.py` copies them to the host, `write.py` and `read.py` do what
they are called, `saver.py` does the former two while training goes on, `select.py` finds the newest good one,
`inspect.py` looks at any of them (`python -m train.checkpoint`).
"""
