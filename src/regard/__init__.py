"""regard: attention patterns in transformers.

`import regard` is light: torch and the rest are imported when a name below is first used.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from regard.kernels.attend import attend as attend
    from regard.kernels.explain import explain as explain
    from regard.measures.roles import roles as roles
    from regard.plan.build import plan as plan
    from regard.plan.plan import Plan as Plan
    from regard.plan.plan import load_plan as load_plan
    from regard.report.build import report as report
    from regard.studies.protocol import study as study
    from regard.tasks.testbeds import load as load
    from regard.watch.anatomy import anatomy as anatomy
    from regard.watch.atlas import Atlas as Atlas
    from regard.watch.atlas import load_atlas as load_atlas
    from regard.watch.attend_with import attend_with as attend_with
    from regard.watch.intervene import Edit as Edit
    from regard.watch.intervene import Site as Site
    from regard.watch.intervene import intervene as intervene
    from regard.watch.intervene import scan as scan
    from regard.watch.intervene import trace as trace
    from regard.watch.recorder import watch as watch

    steer = intervene

_HOME = {
    "attend": "regard.kernels.attend:attend",
    "explain": "regard.kernels.explain:explain",
    "attend_with": "regard.watch.attend_with:attend_with",
    "Atlas": "regard.watch.atlas:Atlas",
    "load_atlas": "regard.watch.atlas:load_atlas",
    "roles": "regard.measures.roles:roles",
    "load": "regard.tasks.testbeds:load",
    "trace": "regard.watch.intervene:trace",
    "intervene": "regard.watch.intervene:intervene",
    "Site": "regard.watch.intervene:Site",
    "Edit": "regard.watch.intervene:Edit",
    "scan": "regard.watch.intervene:scan",
    "anatomy": "regard.watch.anatomy:anatomy",
    "Plan": "regard.plan.plan:Plan",
    "load_plan": "regard.plan.plan:load_plan",
    "study": "regard.studies.protocol:study",
}
_PACKAGES = ("watch", "report", "steer", "plan")  # callable, and folders of modules too

__all__ = ["__version__", *_HOME, *_PACKAGES]


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        import importlib

        return importlib.import_module(f"regard.{name}")
    if name in _HOME:
        from regard._callable import resolve

        found = globals()[name] = resolve(_HOME[name])
        return found
    raise AttributeError(f"module 'regard' has no attribute {name!r}; it has {', '.join(sorted(__all__))}")


def __dir__() -> list[str]:
    return sorted(__all__)
