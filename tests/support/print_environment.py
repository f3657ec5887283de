"""Print this process's environment as one line of JSON."""

import json
import os

if __name__ == "__main__":
    print(json.dumps(dict(os.environ)), flush=True)
