"""llama.cpp's server for one GGUF file, run by runtimes.py as a process of its own:

    python -P llama_cpp_server.py vocabulary.gguf

Prints its address and serves until its input ends. Apart, because llama.cpp aborts the process on a vocabulary that it
finds impossible, and because stopping the server inside a process can block for ever (a race in xllamacpp).
"""

import os
import sys

from xllamacpp import CommonParams, Server


def main(path: str) -> None:
    """Serve `path` on a free port of this machine. The smallest context, no warm-up, no log."""
    params = CommonParams()
    params.model.path = path
    params.port = 0
    params.n_ctx = 32
    params.n_parallel = 1
    params.n_gpu_layers = 0
    params.warmup = False
    params.fit_params = False
    params.verbosity = -1
    server = Server(params)
    print(server.listening_address, flush=True)
    sys.stdin.read()
    # Not by way of the server's destructor, which is what can block.
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
