"""What the tests of the team's services share."""

from collections.abc import Iterator

import pytest

from postgres import programs
from team import Team, services


@pytest.fixture(scope="module")
def team(object_store: str) -> Iterator[Team]:
    """PostgreSQL, an S3 API and an MLflow server."""
    if programs() is None:
        pytest.skip("PostgreSQL is not installed: apt-get install postgresql")
    pytest.importorskip("psycopg2", reason="pip install 'maskray[services]'")
    with pytest.MonkeyPatch.context() as patch, services(object_store, patch.setenv) as team:
        yield team
