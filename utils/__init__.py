"""What the scripts share: the method, one idea a file, over results/, data/ and run/; options/ for command lines.

pyproject.toml states which module may import which; `lint-imports` checks it.
"""
