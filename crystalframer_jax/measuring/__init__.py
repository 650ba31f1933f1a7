"""What is measured on a machine: crystals, programs, and their times in turns; checks of kernels."""
