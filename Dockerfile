# hsrloop in a container: docker compose run hsr-perception train --dataset /work/data/data.yaml
# The GPU libraries come with the torch wheels; the host brings the driver and the NVIDIA Container Toolkit.
FROM python:3.11-slim-bookworm

# OpenCV's shared libraries.
RUN apt-get update \
    && apt-get install -y --no-install-recommends libgl1 libglib2.0-0 \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /app
COPY setup.cfg pyproject.toml constraints.txt README.md LICENSE ./
COPY hsrloop ./hsrloop
RUN pip install --no-cache-dir -c constraints.txt '.[export]'

# Runs, weights and data sets live in mounted folders, see compose.yaml.
WORKDIR /work
ENTRYPOINT ["hsrloop"]
CMD ["--help"]
