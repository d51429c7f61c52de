"""What a fork server has imported, and made, before it forks commands and ranks."""

import importlib
from contextlib import suppress

from PIL import Image

from dan_dist.data.graph import batch_graph

MODULES = [
    "dan_dist.train", "dan_dist.ablation.ablate", "dan_dist.certificate", "dan_dist.dry_run",
    "dan_dist.inference.explain", "dan_dist.inference.export", "dan_dist.inference.predict",
    "torch._dynamo", "torch.distributed.run", "pytest",
    "mlflow.pyfunc", "mlflow.store.tracking.sqlalchemy_store", "flask_cors", "graphene",
    "alembic.command", "alembic.config", "pyarrow.parquet", "pyarrow.pandas_compat",
]  # fmt: skip

for name in MODULES:
    with suppress(ImportError):  # a machine lent for minutes lacks some
        importlib.import_module(name)

Image.init()
for augment in (True, False):  # DALI rewrites the graph's functions at their first call
    batch_graph(
        lambda _: (), 32, False, augment, "cpu", batch_size=1, num_threads=1, device_id=None
    )
