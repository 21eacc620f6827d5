"""The processes of a run: how many, which one this is, and waiting for each other.

if fc.multihost.is_primary_host(0):
    print("saved")
"""

from flax_ckpt.storage.hosts import (
    is_primary_host,
    process_count,
    process_index,
    sync_global_processes,
)

__all__ = ["is_primary_host", "process_count", "process_index", "sync_global_processes"]
