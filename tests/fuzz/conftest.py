"""The long run of `make fuzz`; `make test` gives each test hypothesis' usual 100 examples."""

from hypothesis import HealthCheck, settings

settings.register_profile(
    "fuzz", max_examples=5000, deadline=None, suppress_health_check=list(HealthCheck)
)
