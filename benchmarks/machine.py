"""What a reader of a figure has to know of the machine."""

import platform


def machine() -> str:
    """Device, threads and version."""
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}"
