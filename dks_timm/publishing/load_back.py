"""Load an exported folder in a fresh process and write down its logits; see `verify`. A script, run by its path.

Of dks_timm it imports nothing, but for the architectures of this package, which timm alone does not know.
"""
import argparse
import sys

import timm
import torch
from safetensors.torch import load_file, save_file


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument('model_dir')
    parser.add_argument('input_file')
    parser.add_argument('logits_file')
    # Both may change the order or the precision of sums.
    parser.add_argument('--threads', type=int)
    parser.add_argument('--matmul-precision')
    parser.add_argument('--import-from')
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_float32_matmul_precision(args.matmul_precision)
    if args.import_from:
        sys.path.append(args.import_from)
        import dks_timm.models  # noqa: F401
    # Outside of inference_mode, as everybody makes a model: some compute tables then.
    models = dict(timm=timm.create_model(f'local-dir:{args.model_dir}', pretrained=True))
    try:
        from transformers import AutoModelForImageClassification, TimmWrapperConfig  # noqa: F401
        models['transformers'] = AutoModelForImageClassification.from_pretrained(args.model_dir, dtype=torch.float32)
    except ImportError:
        pass
    except Exception as e:  # whatever another library's loader raises is a warning
        print(f'transformers cannot load it: {type(e).__name__}: {e}')
    x = load_file(args.input_file)['x']
    with torch.inference_mode():
        logits = {name: model.eval()(x) for name, model in models.items()}
    save_file({name: getattr(out, 'logits', out).contiguous() for name, out in logits.items()}, args.logits_file)


if __name__ == '__main__':
    main()
