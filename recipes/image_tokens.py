"""Token ids of an image dataset, for recipes/image_train.py: codes of a VQ tokenizer, or pixels.

Images are encoded once: the tokenizer of the paper's ImageNet runs has 72 million parameters, and the released code
runs it in every training step. A mirror image of each image is its own row. ImageNet takes 1.3 GB and CIFAR-10 0.3 GB.

    python recipes/image_tokens.py --dataset path/to/imagenet/train --vqvae path/to/vq_ds16_c2i.pt --image_size 256 \\
        --device cuda --output_dir codes/imagenet
    python recipes/image_tokens.py --dataset uoft-cs/cifar10 --pixels --output_dir codes/cifar10

`--dataset` is a folder with a folder of images for each class, a folder of `Dataset.save_to_disk`, or a Hub name.
`--vqvae` is a diffusers `VQModel` (folder or Hub name), or LlamaGen's file. A run that was interrupted goes on after
its last whole shard. For evaluation, encode the validation split with `--no-flips`.
"""

import argparse
import sys
from pathlib import Path

from xdlm_hf.convert import llamagen_vq, read_weights
from xdlm_hf.data.image_tokens import ImageSource, TokenWriter
from xdlm_hf.data.images import VQCodes, load_vq
from xdlm_hf.training.processes import run_script


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True, help="folder, or Hub name")
    parser.add_argument("--split", default="train")
    parser.add_argument("--label_column", help="default: the first column of classes")
    parser.add_argument("--revision", help="branch, tag or commit on the Hub")
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--vqvae", help="VQ tokenizer: folder, Hub name, or LlamaGen's file")
    kind.add_argument("--pixels", action="store_true", help="ids are the values of the pixels")
    parser.add_argument("--subfolder", help="of the VQ tokenizer")
    parser.add_argument(
        "--image_size", type=int, help="resize the shorter side, crop the centre (default: as they are)"
    )
    parser.add_argument("--flips", action=argparse.BooleanOptionalAction, default=True, help="mirror images as rows")
    parser.add_argument("--skip_damaged", action="store_true", help="leave out images that cannot be read")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--shard_size", type=int, default=4096, help="images per shard")
    parser.add_argument("--device", default="cpu")
    return parser.parse_args(argv)


def load_tokenizer(options: argparse.Namespace) -> VQCodes | None:
    if options.pixels:
        return None
    if Path(options.vqvae).is_file():
        codes = VQCodes(llamagen_vq(read_weights(options.vqvae, ema=False)[0]))
    else:
        codes = load_vq(options.vqvae, options.subfolder)
    codes.vqvae.to(options.device)
    return codes


def main(argv: list[str] | None = None) -> None:
    options = parse(sys.argv[1:] if argv is None else argv)
    source = ImageSource(options.dataset, options.split, options.label_column, options.revision)
    writer = TokenWriter(
        source,
        load_tokenizer(options),
        image_size=options.image_size,
        flips=options.flips,
        skip_damaged=options.skip_damaged,
        batch_size=options.batch_size,
        shard_size=options.shard_size,
    )
    writer.write(options.output_dir, show_progress=sys.stderr.isatty())
    settings = writer.settings
    what = "pixels" if settings.grid is None else f"codes of {settings.tokens}"
    classes = "no classes" if settings.classes is None else f"{len(settings.classes)} classes"
    print(f"{settings.images} images as {settings.length} {what}, {classes}: {options.output_dir}")


if __name__ == "__main__":
    run_script(main)
