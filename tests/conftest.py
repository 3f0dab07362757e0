import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the scripts lie in the repo's root
torch.set_num_threads(1)
# most tests compare with restatements on the CPU, bit for bit; test_cuda.py shows the GPU to others
os.environ.setdefault("GPUS_FOR_TESTS", os.environ.get("CUDA_VISIBLE_DEVICES", "0"))
os.environ["CUDA_VISIBLE_DEVICES"] = ""
