"""
.. include:: ../README.md
.. include:: restore.md
.. include:: support.md
.. include:: sdo.md
.. include:: align.md
.. include:: gpu.md
.. include:: ../CONTRIBUTING.md
"""
