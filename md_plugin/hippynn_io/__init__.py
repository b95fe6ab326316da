"""Potentials from hippynn and back: what it trained, saved or holds in memory.

    reading    from_hippynn, import_hippynn
    writing    to_hippynn, export_hippynn

settings and state know hippynn's names; network and graph read its objects; build makes networks
of them, compare holds those against hippynn's own modules, files reads what is on disk.
"""

from md_plugin.hippynn_io.reading import from_hippynn, import_hippynn
from md_plugin.hippynn_io.settings import HippynnError
from md_plugin.hippynn_io.writing import export_hippynn, to_hippynn

__all__ = ["HippynnError", "export_hippynn", "from_hippynn", "import_hippynn", "to_hippynn"]
