"""Compare results: one table of their reports (Markdown), one page of all, and figures side by side.

python scripts/compare.py logged_files results --out comparison
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.options import Parser
from utils.results import compare, figures, page
from utils.run import errors, files
from utils.run.log import log0, print0


def parse():
    parser = Parser(__doc__)
    parser.add_argument(
        "folders", nargs="+", metavar="RESULT_FOLDER", help="with a report of evaluate_*.py, in it or below"
    )
    parser.add_argument(
        "--out",
        help="folder for report.md, report.csv, the page report.html and the figures (default: only print the table)",
    )
    return parser.parse_args()


def main():
    args = parse()
    results = compare.find(args.folders)
    table = compare.as_markdown(results)
    print0(table)
    if not args.out:
        return
    out = Path(args.out)
    texts = {"report.md": table + "\n", "report.csv": compare.as_csv(results), "report.html": page.render(results)}
    for name, text in texts.items():
        with files.atomic(out / name, "w") as file:
            file.write(text)
        log0(f"written: {out / name}")
    for path in figures.draw_all(results, out):
        log0(f"written: {path}")


if __name__ == "__main__":
    errors.run(main)
