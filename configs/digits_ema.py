"""Hyperparameters for `examples/train_digits_ema.py`."""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()

    config.seed = 0
    config.features = (32, 64)  # channels of each convolution
    config.dtype = "float32"  # of the activations; parameters are float32

    config.num_eval = 237  # of the training images, to choose the best step by
    config.batch_size = 64
    config.num_steps = 600
    config.warmup_steps = 50
    config.learning_rate = 3e-3
    config.weight_decay = 1e-3
    config.ema_decay = 0.98

    config.log_every_steps = 100
    config.checkpoint_every_steps = 50
    return config
