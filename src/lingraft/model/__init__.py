"""Checkpoints and the parts of a model that train: load, save, surgery, row-wise matrices, LoRA, merge."""

import logging

# peft imports bitsandbytes, which warns at import about CPU kernels that nothing here uses
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
