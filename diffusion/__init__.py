"""The mathematics and the models: schedules, processes, samplers, networks, metrics, figures."""
