"""Tables of Markdown, as tests read them."""


def cells(text: str, title: str = "") -> dict[str, list[str]]:
    """The first table below a title: the first cell of each line → the others."""
    lines = text[text.index(title) :].splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("|"))
    table = {}
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        first, *others = line.strip("| ").split(" | ")
        table[first] = others
    return table
