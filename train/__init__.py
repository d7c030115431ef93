"""The trainer: config schema, model, parallel layers, engine, loop, checkpoints, evaluation, reports."""
