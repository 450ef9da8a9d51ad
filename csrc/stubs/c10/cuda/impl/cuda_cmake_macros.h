// Stands for what a CUDA build of PyTorch generates, for check.py alone.
#pragma once
