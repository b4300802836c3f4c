"""Blocks of an answer: their columns and their steps."""

from bisect import bisect_right
from itertools import accumulate

from ..diffusion.checks import check_positive


class Blocks:
    """Blocks of equal length from left to right, the last of which may be shorter, and the steps of each.

    Steps spread evenly; earlier blocks take the remainder, and a short last block gets no more steps than it has
    columns.

    Args:
        start, length: The answer is the columns [start, start + length).
        block_length: Columns of a block.
        steps: Steps of all blocks together; 0 when nothing is filled.
    """

    def __init__(self, start: int, length: int, block_length: int, steps: int):
        count = num_blocks(length, block_length)
        self.columns = [
            (start + first, start + min(first + block_length, length)) for first in range(0, length, block_length)
        ]
        last = min(steps // count, length - (count - 1) * block_length)
        whole, rest = divmod(steps - last, count - 1) if count > 1 else (0, 0)
        self.steps = [whole + (block < rest) for block in range(count - 1)] + [last if count > 1 else steps]
        self.first_steps = [0, *accumulate(self.steps)][:-1]

    def block_of(self, i: int) -> int:
        """Index of the block that step `i` fills."""
        return bisect_right(self.first_steps, i) - 1

    def step_in_block(self, i: int) -> tuple[int, int]:
        """Index of step `i` within its block, and the number of steps of that block."""
        block = self.block_of(i)
        return i - self.first_steps[block], max(self.steps[block], 1)

    def next_block(self, i: int) -> int:
        """The first step after the block of step `i`."""
        block = self.block_of(i)
        return self.first_steps[block] + self.steps[block]


def num_blocks(length: int, block_length: int) -> int:
    return -(-length // block_length)


def check_blocks(steps: int, length: int, block_length: int, name: str = "max_new_tokens") -> None:
    """Raise ValueError unless each step can fill a token and each block has a step; `name` is the option `length`."""
    check_positive(**{"steps": steps, name: length, "block_length": block_length})
    if steps > length:
        raise ValueError(
            f"steps={steps} is more than {name}={length}: every step fills at least one token; use steps={length}."
        )
    blocks = num_blocks(length, block_length)
    if steps < blocks:
        raise ValueError(
            f"steps={steps} is too few for the {blocks} blocks of {block_length} tokens, which need one step each; use "
            f"steps={blocks} or more, or a larger block_length."
        )


def check_even_blocks(steps: int, length: int, block_length: int) -> None:
    """Raise ValueError unless `block_length` divides the length and the steps spread evenly over the blocks."""
    check_positive(steps=steps, max_new_tokens=length, block_length=block_length)
    if length % block_length:
        divisors = [d for d in range(1, length + 1) if length % d == 0]
        nearest = min(divisors, key=lambda d: abs(d - block_length))
        raise ValueError(
            f"block_length={block_length} does not divide max_new_tokens={length}; use e.g. block_length={nearest}."
        )
    blocks = length // block_length
    if steps % blocks:
        raise ValueError(
            f"steps={steps} does not spread evenly over the {blocks} blocks of {block_length} tokens; "
            f"use a multiple of {blocks}, e.g. steps={-(-steps // blocks) * blocks}."
        )
