"""Made-up lines of a data file."""

import json

CANONICAL = "class Solution:\n    def total(self, xs):\n        return sum(x + 3 for x in xs if x > 4)"
INPUTS = ([3, 1], [5], [9, 9, 4], [], [7, 2, 6])


def row(**changes):
    """One line of a data file."""
    cases = [f"assert Solution().total({xs}) == {sum(x + 3 for x in xs if x > 4)}" for xs in INPUTS]
    line = {
        "id": 7,
        "difficulty": "medium",
        "prompt": [
            {"role": "system", "content": "Write Python."},
            {"role": "user", "content": "Sum. A method of the class Solution called total and should pass all tests. Go."},
        ],
        "func_name": "Solution().total",
        "gt_answer": cases,
        "setup_code": "import math\nfrom collections import *\nfrom typing import *\nimport random",
        "canonical_solution": CANONICAL,
        "anything else": [1, None],
    }
    return {**line, **changes}


def write(path, *rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path
