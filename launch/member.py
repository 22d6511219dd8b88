"""One member of `launch.many`: `python -m launch.member PARENT WORD...` runs `ngpt WORD...`, and ends when its parent ends."""

import sys

from ngpt.lifetime import end_with_parent

if __name__ == "__main__":
    end_with_parent(int(sys.argv[1]))
    from .cli import main

    sys.exit(main(sys.argv[2:]))
