"""Hyperparameters for `examples/train_digits_nnx.py`."""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()

    config.seed = 0
    config.features = (32, 64)  # channels of each convolution
    config.dtype = "float32"  # of the activations; parameters are float32
    config.dropout_rate = 0.2

    config.batch_size = 64
    config.num_steps = 1000
    config.warmup_steps = 100
    config.learning_rate = 3e-3
    config.weight_decay = 1e-3

    config.eval_every_steps = 250
    config.checkpoint_every_steps = 50
    return config
