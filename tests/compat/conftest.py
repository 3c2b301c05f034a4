import pytest
import vector_quantize_pytorch

import spinlock_fast


@pytest.fixture(autouse=True)
def _stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("VectorQuantize", "ResidualVQ"):
        if not hasattr(spinlock_fast, name):
            monkeypatch.setattr(spinlock_fast, name, getattr(vector_quantize_pytorch, name), raising=False)
