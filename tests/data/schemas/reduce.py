"""Reduces what README.md names to the schemas beside it.

`python tests/data/schemas/reduce.py CRD_FOLDER GOOGLE_WHEEL`: CRD_FOLDER is KubeRay's
helm-chart/kuberay-operator/crds, GOOGLE_WHEEL is google-api-python-client's.
"""

import gzip
import json
import sys
import zipfile
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
PROSE = ("description", "enumDescriptions", "annotations", "x-kubernetes-validations")


def drop_prose(schema: Any) -> Any:
    if isinstance(schema, list):
        return [drop_prose(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: {name: drop_prose(each) for name, each in value.items()}
        if key == "properties"
        else drop_prose(value)
        for key, value in schema.items()
        if key not in PROSE
    }


def find_references(schema: Any) -> set[str]:
    if isinstance(schema, list):
        return {name for each in schema for name in find_references(each)}
    if not isinstance(schema, dict):
        return set()
    own = {schema["$ref"]} if isinstance(schema.get("$ref"), str) else set()
    return own.union(*(find_references(each) for each in schema.values()))


def write(name: str, schema: Any) -> None:
    text = json.dumps(schema, separators=(",", ":"), sort_keys=True).encode()
    (HERE / name).write_bytes(gzip.compress(text, 9, mtime=0))


def main(crds: Path, wheel: Path) -> None:
    kinds = {}
    for kind, file in (("RayCluster", "rayclusters"), ("RayJob", "rayjobs")):
        definition = yaml.safe_load((crds / f"ray.io_{file}.yaml").read_text())
        (version,) = [each for each in definition["spec"]["versions"] if each["name"] == "v1"]
        kinds[kind] = drop_prose(version["schema"]["openAPIV3Schema"])
    write("kuberay.json.gz", kinds)
    folder = "googleapiclient/discovery_cache/documents"
    with zipfile.ZipFile(wheel) as archive:
        every = json.loads(archive.read(f"{folder}/compute.v1.json"))["schemas"]
    kept, waiting = {}, {"Instance"}
    while waiting:
        name = waiting.pop()
        kept[name] = drop_prose(every[name])
        waiting |= find_references(kept[name]) - set(kept)
    write("compute.json.gz", kept)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
