"""Recognise out-of-memory errors."""

import torch

OUT_OF_MEMORY_SIGNS = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""Parts of the error messages of CPU, CUDA and cuBLAS allocators that have run out of memory."""


def is_out_of_memory(error: BaseException) -> bool:
    """Recognise an out-of-memory error, of a GPU or of the host."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return any(sign in str(error) for sign in OUT_OF_MEMORY_SIGNS)
