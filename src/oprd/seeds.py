"""Where random numbers come from: a seed of its own for every purpose, so that nothing random has a state to be saved."""

import hashlib


def derive_seed(seed: int, *path: object) -> int:
    """A seed that depends on the given one and on what it is for: the purpose, the step, the process, the batch."""
    digest = hashlib.blake2b("/".join(map(str, (seed, *path))).encode(), digest_size=7).digest()
    return int.from_bytes(digest, "big")
