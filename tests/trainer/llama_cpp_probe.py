"""What llama.cpp makes of a GGUF file, as JSON: ``python llama_cpp_probe.py FILE.gguf PROMPT...``.

For each prompt its token ids, and the first token that follows with the logarithm of its probability. A program of its
own: the server that the library starts ends with the process.
"""

import json
import os
import sys
import urllib.request
from typing import Any

import xllamacpp


def main() -> None:
    """Load, ask, print, and leave without waiting for the server's threads."""
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.warmup, params.cpuparams.n_threads = sys.argv[1], 256, False, 2
    server = xllamacpp.Server(params)

    def ask(path: str, **body: Any) -> Any:
        request = urllib.request.Request(
            server.listening_address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as reply:
            return json.load(reply)

    found = []
    for prompt in sys.argv[2:]:
        ids = ask("/tokenize", content=prompt, add_special=True, parse_special=True)["tokens"]
        answer = ask("/completion", prompt=prompt, n_predict=1, temperature=0, n_probs=1, return_tokens=True)
        [first] = answer["completion_probabilities"]
        found.append({"ids": ids, "next": first["id"], "logprob": first["logprob"]})
    print(json.dumps(found), flush=True)
    os._exit(0)


main()
