"""Campaigns that try to make a checkpoint lose or falsify what was saved.

Each module has one, `campaign(scale, seed)`: whole with scale 1 (`make torture`), a sample of it in
the tests. What it finds is an :class:`~torture.outcome.Outcome`.
"""
