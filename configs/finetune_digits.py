"""Hyperparameters for `examples/finetune_digits.py`."""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()

    config.seed = 0
    config.features = (32, 64)  # as in the run that the base comes from
    config.dtype = "float32"  # of the activations; parameters are float32

    config.batch_size = 64
    config.num_steps = 300
    config.learning_rate = 3e-3

    config.eval_every_steps = 100
    config.checkpoint_every_steps = 50
    return config
