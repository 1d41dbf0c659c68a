"""Which books are held out: the ten whose seeded hash comes first. Standard library only.

Run: python split.py BOOKS.txt.xz --text HELDOUT.txt --record heldout.json
"""

import argparse
import hashlib
import json
import lzma

SEED = b"gyre-heldout-1:"
HELDOUT_SHARE = 0.05


def read_books(path):
    """The documents of the NUL-separated collection, in order."""
    with lzma.open(path) as file:
        return [book for book in file.read().decode("utf-8").split("\0") if book.strip()]


def heldout_indices(books):
    """Indices of the validation books, in order. Depends on each book's text, not on its place."""
    rank = lambda i: hashlib.sha256(SEED + books[i].encode()).hexdigest()
    return sorted(sorted(range(len(books)), key=rank)[: round(len(books) * HELDOUT_SHARE)])


def record(books):
    """What identifies the validation books without holding their text."""
    rows = []
    for i in heldout_indices(books):
        first_line = books[i].lstrip().split("\n", 1)[0]
        rows.append({
            "index": i,
            "characters": len(books[i]),
            "first_line_sha256": hashlib.sha256(first_line.encode()).hexdigest(),
            "sha256": hashlib.sha256(books[i].encode()).hexdigest(),
        })
    return {"seed": SEED.decode(), "books": len(books), "heldout": rows}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("books")
    parser.add_argument("--text", help="where to write the held-out books, NUL-separated")
    parser.add_argument("--record", help="where to write their indices and hashes")
    args = parser.parse_args()
    books = read_books(args.books)
    if args.text:
        with open(args.text, "w", encoding="utf-8", newline="") as file:
            file.write("\0".join(books[i] for i in heldout_indices(books)))
    if args.record:
        with open(args.record, "w", encoding="utf-8") as file:
            file.write(json.dumps(record(books), indent=2) + "\n")


if __name__ == "__main__":
    main()
