"""The fake as a WSGI application, and a server for it on loopback.

EBS direct, EC2's part about images, and Service Quotas are answered here, strictly; S3, IAM and STS by moto. The
service and the region are those that the request is signed for.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import socket
import struct
import threading
import time
from functools import partial
from typing import Any
from urllib.parse import parse_qs

from .account import Account, No
from .ec2 import Ec2, xml
from .faults import Faults, Rule

_SCOPE = re.compile(r"Credential=[^/]+/\d{8}/([a-z0-9-]+)/([a-z0-9-]+)/aws4_request")
_ROUTES = (
    ("POST", re.compile(r"/snapshots"), "StartSnapshot"),
    ("PUT", re.compile(r"/snapshots/(?P<id>[^/]+)/blocks/(?P<index>\d+)"), "PutSnapshotBlock"),
    ("GET", re.compile(r"/snapshots/(?P<id>[^/]+)/blocks/(?P<index>\d+)"), "GetSnapshotBlock"),
    ("GET", re.compile(r"/snapshots/(?P<id>[^/]+)/blocks"), "ListSnapshotBlocks"),
    ("GET", re.compile(r"/snapshots/(?P<id>[^/]+)/changedblocks"), "ListChangedBlocks"),
    ("POST", re.compile(r"/snapshots/completion/(?P<id>[^/]+)"), "CompleteSnapshot"),
)
_REFUSALS = {
    "throttle": No(400, "RequestThrottledException", "Rate exceeded", "ACCOUNT_THROTTLED"),
    "500": No(500, "InternalServerException", "An internal error has occurred"),
    "503": No(503, "ServiceUnavailable", "Try again"),
    "refuse-checksum": No(400, "ValidationException", "Checksum does not match the data", "INVALID_PARAMETER_VALUE"),
    "expired": No(400, "ExpiredTokenException", "The security token included in the request is expired"),
    "quota": No(
        402,
        "ServiceQuotaExceededException",
        "Your service quotas do not allow this",
        "DEPENDENCY_SERVICE_QUOTA_EXCEEDED",
    ),
}


class Drop(Exception):
    """The connection is to be reset."""


class Fake:
    """The whole account as a WSGI application. `calls` lists (action, status) in order."""

    def __init__(self, seed: int = 1) -> None:
        self.account = Account()
        self.faults = Faults(seed)
        self.calls: list[tuple[str, int]] = []
        self.quotas: dict[str, float] = {
            "PutSnapshotBlock requests per account": 1000,
            "GetSnapshotBlock requests per account": 1000,
        }
        self._moto: dict[str, Any] = {}
        self._moto_lock = threading.Lock()
        self.ec2 = Ec2(self.account, self.fetch, self.role_trusts)

    # --- moto

    def backend(self, service: str) -> Any:
        from moto.server import create_backend_app

        with self._moto_lock:
            if service not in self._moto:
                self._moto[service] = create_backend_app(service)
            return self._moto[service]

    def bucket(self, name: str) -> Any:
        from moto.s3.models import s3_backends

        self.backend("s3")
        return s3_backends["123456789012"]["aws"].buckets.get(name)

    def objects(self, bucket: str) -> list[str]:
        """Keys of objects, and of multipart uploads that are under way."""
        found = self.bucket(bucket)
        return sorted(found.keys) + [upload.key_name for upload in found.multiparts.values()] if found else []

    def fetch(self, bucket: str, key: str) -> bytes:
        found = self.bucket(bucket)
        if found is None or key not in found.keys:
            raise No(400, "InvalidParameter", f"The given S3 object {bucket}/{key} does not exist")
        return bytes(found.keys[key].value)

    def role_trusts(self, name: str) -> bool:
        from moto.iam.models import iam_backends

        self.backend("iam")
        roles = iam_backends["123456789012"]["aws"].roles.values()
        return any(role.name == name and "vmie.amazonaws.com" in role.assume_role_policy_document for role in roles)

    def reset(self) -> None:
        """Empty moto's part."""
        import moto.backends

        for service in ("s3", "iam"):
            moto.backends.get_backend(service).reset()

    # --- WSGI

    def __call__(self, environ: dict[str, Any], start: Any) -> list[bytes]:
        scope = _SCOPE.search(environ.get("HTTP_AUTHORIZATION", ""))
        region, service = scope.groups() if scope else ("us-east-1", "s3")
        length = environ.get("CONTENT_LENGTH")
        body = environ["wsgi.input"].read(int(length)) if length else b""
        action, run = self.route(environ, service, region, body)
        rule = self.faults.draw(action)
        try:
            self.before(rule, action)
            status, head, answer = run()
        except No as no:
            status, head, answer = no.status, *self.refusal(service, no)
        self.calls.append((action, status))
        if rule is not None and rule.kind == "lost":
            raise Drop
        if rule is not None and rule.kind == "bad-answer":
            head = [(k, base64.b64encode(bytes(32)).decode() if k == "x-amz-Checksum" else v) for k, v in head]
        start(
            f"{status} X",
            [*head, ("Content-Length", str(len(answer)))] if service not in {"s3", "iam", "sts"} or rule else head,
        )
        return [answer]

    def before(self, rule: Rule | None, action: str) -> None:
        if rule is None:
            return
        if rule.kind == "slow":
            time.sleep(rule.seconds)
        elif rule.kind == "hang":
            self.faults.release.wait(60)
            raise Drop
        elif rule.kind == "reset":
            raise Drop
        elif rule.kind == "deny":
            code = "UnauthorizedOperation" if action.startswith("ec2:") else "AccessDeniedException"
            raise No(403, code, f"User is not authorized to perform: {action}")
        elif rule.kind == "throttle" and not action.startswith("ebs:"):
            raise No(503, "RequestLimitExceeded", "Request limit exceeded.")
        elif rule.kind in _REFUSALS:
            raise _REFUSALS[rule.kind]

    @staticmethod
    def refusal(service: str, no: No) -> tuple[list[tuple[str, str]], bytes]:
        if service in {"ebs", "servicequotas"}:
            text = {"message": no.message, "Message": no.message, "__type": no.code} | (
                {"Reason": no.reason} if no.reason else {}
            )
            return [("Content-Type", "application/json"), ("x-amzn-ErrorType", no.code)], json.dumps(text).encode()
        error = xml({"Code": no.code, "Message": no.message})
        wrapped = {"ec2": f"<Response><Errors><Error>{error}</Error></Errors><RequestID>1</RequestID></Response>"}
        return [("Content-Type", "text/xml")], wrapped.get(service, f"<Error>{error}</Error>").encode()

    def route(self, environ: dict[str, Any], service: str, region: str, body: bytes) -> tuple[str, Any]:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        query = {
            key: values[0] for key, values in parse_qs(environ.get("QUERY_STRING", ""), keep_blank_values=True).items()
        }
        if service == "ebs":
            for verb, pattern, action in _ROUTES:
                if verb == method and (found := pattern.fullmatch(path)):
                    head = {k[5:].lower().replace("_", "-"): v for k, v in environ.items() if k.startswith("HTTP_")}
                    return f"ebs:{action}", partial(self.ebs, action, region, found.groupdict(), head, query, body)
        if service == "ec2":
            form = {key: values[0] for key, values in parse_qs(body.decode(), keep_blank_values=True).items()}
            action = form.pop("Action", "")
            form.pop("Version", None)
            return f"ec2:{action}", lambda: (
                200,
                [("Content-Type", "text/xml")],
                self.ec2.call(action, region, form).encode(),
            )
        if service == "servicequotas":
            return "servicequotas:ListServiceQuotas", self.list_quotas
        if service in {"s3", "iam", "sts"}:
            return self.moto_action(service, method, path, query, body), lambda: self.moto(environ, service, body)
        raise No(404, "UnknownOperationException", f"no {service}")

    @staticmethod
    def moto_action(service: str, method: str, path: str, query: dict[str, str], body: bytes) -> str:
        if service != "s3":
            return f"{service}:{parse_qs(body.decode()).get('Action', ['?'])[0]}"
        if "uploadId" in query:
            return {"PUT": "s3:UploadPart", "POST": "s3:CompleteMultipartUpload", "DELETE": "s3:AbortMultipartUpload"}[
                method
            ]
        return "s3:CreateMultipartUpload" if "uploads" in query and method == "POST" else f"s3:{method.title()}"

    def moto(self, environ: dict[str, Any], service: str, body: bytes) -> Any:
        seen: list[Any] = []
        environ["wsgi.input"] = io.BytesIO(body)
        answer = b"".join(
            self.backend(service)(environ, lambda status, head, _=None: seen.extend((int(status.split()[0]), head)))
        )
        return seen[0], seen[1], answer

    def list_quotas(self) -> Any:
        rows = [{"QuotaName": name, "Value": value, "ServiceCode": "ebs"} for name, value in self.quotas.items()]
        return 200, [("Content-Type", "application/json")], json.dumps({"Quotas": rows}).encode()

    def ebs(
        self, action: str, region: str, where: dict[str, str], head: dict[str, str], query: dict[str, str], body: bytes
    ) -> Any:
        account, ident = self.account, where.get("id", "")
        with account.lock:
            if action == "StartSnapshot":
                asked = json.loads(body)
                token = asked.pop("ClientToken", None)
                answer, status = account.once(token, asked, lambda: account.start(region, asked), "start", region), 201
            elif action == "PutSnapshotBlock":
                checksum = account.put(region, ident, int(where["index"]), body, head)
                return 201, [("x-amz-Checksum", checksum), ("x-amz-Checksum-Algorithm", "SHA256")], b"{}"
            elif action == "CompleteSnapshot":
                answer, status = account.complete(region, ident, head), 202
            elif action == "GetSnapshotBlock":
                data = account.block(region, ident, int(where["index"]), query)
                checksum = base64.b64encode(hashlib.sha256(data).digest()).decode()
                return 200, [("x-amz-Checksum", checksum), ("x-amz-Data-Length", str(len(data)))], data
            else:
                answer, status = (
                    (account.blocks if action == "ListSnapshotBlocks" else account.changes)(region, ident, query),
                    200,
                )
        return status, [("Content-Type", "application/json")], json.dumps(answer).encode()


class Serving:
    """A fake that listens on 127.0.0.1 in threads of this process; `url` for AWS_ENDPOINT_URL."""

    def __init__(self, fake: Fake, port: int = 0) -> None:
        from werkzeug.serving import WSGIRequestHandler, make_server

        class Handler(WSGIRequestHandler):
            protocol_version = "HTTP/1.1"

            def log(self, *_: Any) -> None:
                pass

        def app(environ: dict[str, Any], start: Any) -> Any:
            try:
                return fake(environ, start)
            except Drop:
                link = environ["werkzeug.socket"]
                link.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                raise ConnectionResetError from None

        self.server = make_server("127.0.0.1", port, app, threaded=True, request_handler=Handler)
        self.server.daemon_threads = True  # type: ignore[attr-defined]
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self._thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
