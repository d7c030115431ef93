"""The pipeline's steps, in the order in which they run: clean, match, decide, learn, tokenise, finish.

Each is a datatrove step, `run(documents, rank, world_size)`, so that any of its executors can run it. What a rank makes
lies in `.work/<stage>/<rank>/`, which appears whole or not at all; the executor then leaves its marker.
"""
