"""Load an exported folder in a fresh process and save its logits; see `export.verify`. A script, run by its path.

Of dks_timm it imports nothing, but for the architectures of this package, which timm alone does not know.
"""
import json
import sys

import timm
import torch
from safetensors.torch import save_file

model_dir, logits_file, input_size, threads, matmul_precision, *import_from = sys.argv[1:]
torch.set_num_threads(int(threads))  # threads and precision change the order of sums
torch.set_float32_matmul_precision(matmul_precision)
if import_from:
    sys.path.append(*import_from)
    import dks_timm.models  # noqa: F401
# Outside of inference_mode, as everybody makes a model: some compute tables then.
model = timm.create_model(f'local-dir:{model_dir}', pretrained=True).eval()
x = torch.randn(2, *json.loads(input_size), generator=torch.Generator().manual_seed(0))
with torch.inference_mode():
    save_file({'logits': model(x).contiguous()}, logits_file)
