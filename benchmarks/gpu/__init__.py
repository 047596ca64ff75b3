"""The stages of `gpu_check.py`: a module for each, which says what its processes do and how long they may take."""
