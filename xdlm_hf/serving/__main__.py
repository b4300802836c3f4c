"""`python -m xdlm_hf.serving` is `xdlm-serve`."""

from .server import main

main()
