"""A folder of small images by class, and a tokenizer of their patches."""

import numpy as np
import torch
from PIL import Image

from xdlm_hf.data.patch_vq import PatchVQ


def image_folder(folder, classes=3, each=4, size=8, mode="L"):
    """Images `{class}/{number}.png`, brighter in later classes, none of them its own mirror image."""
    generator = np.random.default_rng(0)
    for label in range(classes):
        (folder / f"class{label}").mkdir(parents=True)
        for i in range(each):
            pixels = generator.integers(60 * label, 60 * label + 80, (size, size, 3), dtype=np.uint8)
            Image.fromarray(pixels).convert(mode).save(folder / f"class{label}" / f"{i}.png")
    return folder


def patch_tokenizer(folder=None, num_codes=16, patch_size=2, channels=1):
    """A codebook of random patches, also written to the folder."""
    torch.manual_seed(0)
    vqvae = PatchVQ(num_codes, patch_size, channels)
    torch.nn.init.uniform_(vqvae.quantize.embedding.weight, -1, 1)
    if folder is not None:
        vqvae.save_pretrained(folder)
    return vqvae
