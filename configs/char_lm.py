"""Hyperparameters for `examples/train_char_lm.py`."""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()

    config.seed = 0
    config.num_characters = 1_000_000  # of Python's own sources
    config.context = 64  # characters that the model sees at once

    config.num_layers = 2
    config.num_heads = 4
    config.width = 64

    config.batch_size = 32
    config.num_steps = 1000
    config.warmup_steps = 50
    config.learning_rate = 3e-3

    config.log_every_steps = 100
    config.checkpoint_every_steps = 100
    return config
