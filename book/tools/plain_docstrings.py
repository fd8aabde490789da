"""Sphinx extension: docstrings write ``(*batch, d)`` and ``|x|`` plainly, not as markup.

reStructuredText reads a lone asterisk as the start of emphasis and a bar as that of a substitution.
Both are escaped before Sphinx parses a docstring; emphasis that is closed stays.
"""

import re

LITERAL = re.compile(r"(``.+?``|`[^`]+`_*)")
# An opened and closed emphasis, or a lone character that wants an escape.
MARKS = re.compile(r"(?<![\w*])(\*{1,2})(?=\S)[^*]*[^*\s]\1(?![\w*])|[*|]")


def escape(line: str) -> str:
    """Escape the lone asterisks and the bars of a line outside its literals."""
    parts = LITERAL.split(line)
    parts[::2] = [
        MARKS.sub(lambda m: m[0] if len(m[0]) > 1 else rf"\{m[0]}", part) for part in parts[::2]
    ]
    return "".join(parts)


def escape_docstring(app, what, name, obj, options, lines):
    """Escape the lines of a docstring in place, literal blocks and examples excepted."""
    block = None  # the indentation of the paragraph that opened a literal block
    for i, line in enumerate(lines):
        indent = len(line) - len(line.lstrip())
        if block is not None and line.strip() and indent <= block:
            block = None
        if block is None and not line.lstrip().startswith((">>>", "...")):
            lines[i] = escape(line)
            if line.rstrip().endswith("::"):
                block = indent


def skip_generated(app, what, name, obj, skip, options):
    """Leave out the fields of named tuples, whose docstrings only count them."""
    return True if (obj.__doc__ or "").startswith("Alias for field number") else None


def setup(app):
    """Register with Sphinx; the escapes run before napoleon."""
    app.connect("autodoc-process-docstring", escape_docstring, priority=400)
    app.connect("autodoc-skip-member", skip_generated)
    return {"parallel_read_safe": True}
