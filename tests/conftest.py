"""For all tests: the system's own tools (ip, nft) are found where a user's PATH lacks them."""

import os

os.environ["PATH"] = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
