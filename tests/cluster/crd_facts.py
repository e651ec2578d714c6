"""What API servers accept of the objects in our manifests, as JSON Schemas written by hand.

Names, types, enumerations and required fields of what we use of KubeRay 1.7 (ray.io/v1) and
Kubernetes (batch/v1, core/v1). A name that is not here is refused, so that typing errors are found.
"""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

STRING: Schema = {"type": "string", "minLength": 1}
COUNT: Schema = {"type": "integer", "minimum": 0}
FLAG: Schema = {"type": "boolean"}
QUANTITY: Schema = {
    "type": "string",
    "pattern": r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|P|Ki|Mi|Gi|Ti|Pi)?$",
}
NAME: Schema = {"type": "string", "pattern": r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$"}


def fields(required: tuple[str, ...] = (), **known: Schema) -> Schema:
    return {
        "type": "object",
        "properties": known,
        "required": list(required),
        "additionalProperties": False,
    }


def many(item: Schema, at_least: int = 0) -> Schema:
    return {"type": "array", "items": item, "minItems": at_least}


REFERENCE = fields(("name",), name=NAME, optional=FLAG)
KEY_REFERENCE = fields(("name", "key"), name=NAME, key=STRING, optional=FLAG)
# A literal value is refused, because it may be a secret.
ENV = fields(
    ("name", "valueFrom"),
    name=STRING,
    valueFrom=fields(secretKeyRef=KEY_REFERENCE, configMapKeyRef=KEY_REFERENCE),
)
AMOUNTS: Schema = {"type": "object", "additionalProperties": QUANTITY, "minProperties": 1}
RESOURCES = fields(("requests", "limits"), requests=AMOUNTS, limits=AMOUNTS)
CONTAINER_SECURITY = fields(
    ("allowPrivilegeEscalation", "capabilities"),
    allowPrivilegeEscalation={"const": False},
    capabilities=fields(drop=many(STRING), add=many(STRING)),
    readOnlyRootFilesystem=FLAG,
)
CONTAINER = fields(
    ("name", "image", "resources", "securityContext"),
    name=NAME,
    image=STRING,
    command=many(STRING),
    args=many(STRING),
    env=many(ENV),
    envFrom=many(fields(secretRef=REFERENCE, configMapRef=REFERENCE)),
    ports=many(
        fields(
            ("containerPort",),
            name={"type": "string", "pattern": r"^[a-z0-9-]{1,15}$"},
            containerPort={"type": "integer", "minimum": 1, "maximum": 65535},
        )
    ),
    resources=RESOURCES,
    securityContext=CONTAINER_SECURITY,
    volumeMounts=many(fields(("name", "mountPath"), name=NAME, mountPath=STRING, readOnly=FLAG)),
)
POD = fields(
    ("containers", "securityContext"),
    serviceAccountName=NAME,
    automountServiceAccountToken=FLAG,
    terminationGracePeriodSeconds=COUNT,
    restartPolicy={"enum": ["Always", "OnFailure", "Never"]},
    securityContext=fields(
        ("runAsNonRoot", "runAsUser", "seccompProfile"),
        runAsNonRoot={"const": True},
        runAsUser={"type": "integer", "minimum": 1},
        fsGroup=COUNT,
        seccompProfile=fields(("type",), type={"enum": ["RuntimeDefault", "Localhost"]}),
    ),
    nodeSelector={"type": "object", "additionalProperties": STRING},
    tolerations=many(
        fields(
            key=STRING,
            operator={"enum": ["Exists", "Equal"]},
            value=STRING,
            effect={"enum": ["NoSchedule", "PreferNoSchedule", "NoExecute"]},
        )
    ),
    containers=many(CONTAINER, 1),
    volumes=many(
        fields(
            ("name",), name=NAME, emptyDir=fields(medium={"enum": ["Memory"]}, sizeLimit=QUANTITY)
        )
    ),
)
METADATA = fields(("name",), name=NAME, labels={"type": "object"}, annotations={"type": "object"})
TEMPLATE = fields(("spec",), metadata={"type": "object"}, spec=POD)
# To KubeRay, all parameters of `ray start` are strings, also numbers.
START_PARAMS: Schema = {"type": "object", "additionalProperties": {"type": "string"}}
CLUSTER_SPEC = fields(
    ("headGroupSpec",),
    rayVersion={"type": "string", "pattern": r"^\d+\.\d+\.\d+$"},
    enableInTreeAutoscaling=FLAG,
    authOptions=fields(("mode",), mode={"enum": ["token", "disabled"]}, secretName=NAME),
    autoscalerOptions=fields(
        version={"enum": ["v1", "v2"]},
        idleTimeoutSeconds=COUNT,
        upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]},
        resources=RESOURCES,
        securityContext=CONTAINER_SECURITY,
    ),
    headGroupSpec=fields(
        ("template",),
        rayStartParams=START_PARAMS,
        serviceType={"enum": ["ClusterIP", "NodePort", "LoadBalancer"]},
        template=TEMPLATE,
    ),
    workerGroupSpecs=many(
        fields(
            ("groupName", "template", "minReplicas", "maxReplicas"),
            groupName=NAME,
            replicas=COUNT,
            minReplicas=COUNT,
            maxReplicas=COUNT,
            numOfHosts=COUNT,
            rayStartParams=START_PARAMS,
            template=TEMPLATE,
        )
    ),
    suspend=FLAG,
)
JOB_SPEC = fields(
    ("entrypoint",),
    entrypoint=STRING,
    submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
    runtimeEnvYAML=STRING,
    shutdownAfterJobFinishes=FLAG,
    ttlSecondsAfterFinished=COUNT,
    backoffLimit=COUNT,
    activeDeadlineSeconds=COUNT,
    suspend=FLAG,
    submitterPodTemplate=TEMPLATE,
    clusterSelector={"type": "object", "additionalProperties": STRING},
    rayClusterSpec=CLUSTER_SPEC,
)
CRON: Schema = {"type": "string", "pattern": r"^([0-9*/,-]+ ){4}[0-9*/,-]+$"}


def kind(api: str, name: str, spec: Schema) -> Schema:
    return fields(
        ("apiVersion", "kind", "metadata", "spec"),
        apiVersion={"const": api},
        kind={"const": name},
        metadata=METADATA,
        spec=spec,
    )


KINDS: dict[str, Schema] = {
    "RayCluster": kind("ray.io/v1", "RayCluster", CLUSTER_SPEC),
    "RayJob": kind("ray.io/v1", "RayJob", JOB_SPEC),
    "RayCronJob": kind(
        "ray.io/v1",
        "RayCronJob",
        fields(
            ("schedule", "jobTemplate"),
            schedule=CRON,
            timeZone=STRING,
            suspend=FLAG,
            jobTemplate=JOB_SPEC,
        ),
    ),
    "CronJob": kind(
        "batch/v1",
        "CronJob",
        fields(
            ("schedule", "jobTemplate"),
            schedule=CRON,
            timeZone=STRING,
            suspend=FLAG,
            concurrencyPolicy={"enum": ["Allow", "Forbid", "Replace"]},
            startingDeadlineSeconds=COUNT,
            successfulJobsHistoryLimit=COUNT,
            failedJobsHistoryLimit=COUNT,
            jobTemplate=fields(
                ("spec",),
                spec=fields(
                    ("template",),
                    backoffLimit=COUNT,
                    activeDeadlineSeconds=COUNT,
                    ttlSecondsAfterFinished=COUNT,
                    template=TEMPLATE,
                ),
            ),
        ),
    ),
}
