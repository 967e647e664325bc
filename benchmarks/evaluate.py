#!/usr/bin/env python3
"""Evaluate an exported folder with timm alone: top-1, top-5 and loss on a validation split.

    python benchmarks/evaluate.py out/resnet50 --data-dir path/to/images
"""
import argparse
import json

import timm
import torch
from timm.data import create_dataset, create_loader, resolve_model_data_config
from timm.task import ClassificationEvaluator


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('model_dir', help='exported folder')
    parser.add_argument('--data-dir', required=True, help='folder with the split')
    parser.add_argument('--split', default='validation', help='split to evaluate on')
    parser.add_argument('--batch-size', type=int, default=256)
    parser.add_argument('--workers', type=int, default=1)
    args = parser.parse_args()

    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device('cpu')
    model = timm.create_model(f'local-dir:{args.model_dir}', pretrained=True).to(device).eval()
    config = resolve_model_data_config(model)
    loader = create_loader(
        create_dataset('', root=args.data_dir, split=args.split),
        input_size=config['input_size'],
        batch_size=args.batch_size,
        interpolation=config['interpolation'],
        mean=config['mean'],
        std=config['std'],
        crop_pct=config['crop_pct'],
        num_workers=args.workers,
        device=device,
    )
    evaluator = ClassificationEvaluator(device)
    with torch.inference_mode():
        for images, target in loader:
            evaluator.update(model(images), target)
    print(json.dumps(dict(model_dir=args.model_dir, images=evaluator.num_samples, **evaluator.compute())))


if __name__ == '__main__':
    main()
