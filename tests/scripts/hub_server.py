"""A stand-in for the hub's HTTP interface: creates repositories, takes regular and LFS uploads, can refuse either."""

import base64
import hashlib
import http.server
import json
import threading


class HubServer:
    """Listens on a free local port; `url` is its HF_ENDPOINT."""

    def __init__(self, refuse_create=(), refuse_upload=()):
        """Args: names of repositories that may not be created or filled. `requests`: (path, authorization) of each one."""
        self.refuse_create, self.refuse_upload = refuse_create, refuse_upload
        self.created, self.commits, self.files, self.blobs, self.requests = [], {}, {}, {}, []
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _answer(self, value, code=200):
                body = json.dumps(value).encode()
                self.send_response(code)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def _handle(self):
                if "chunked" in self.headers.get("Transfer-Encoding", ""):
                    body = b""
                    while size := int(self.rfile.readline().split(b";")[0], 16):
                        body += self.rfile.read(size)
                        self.rfile.readline()
                    self.rfile.readline()
                else:
                    body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                hub.requests.append((self.path, self.headers.get("Authorization")))
                self._answer(*hub.answer(self.command, self.path.split("?")[0], body))

            do_GET = do_POST = do_PUT = do_HEAD = _handle

            def log_message(self, *args):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.server.shutdown()
        self.server.server_close()

    def answer(self, method, path, body):
        """(JSON value, status) for one request."""
        if method == "PUT" and path.startswith("/blobs/"):
            return self._store(path.removeprefix("/blobs/"), body)
        if method != "POST":
            return {"error": "Not Found"}, 404
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            return {"errors": [], "warnings": []}, 200
        if "/preupload/" in path:
            if path.removeprefix("/api/models/").split("/preupload/")[0] in self.refuse_upload:
                return {"error": "You have exceeded your storage quota."}, 403
            files = json.loads(body)["files"]
            return {"files": [{"path": file["path"], "shouldIgnore": False,
                               "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular"}
                              for file in files]}, 200  # fmt: skip
        if path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            upload = [
                {**entry, "actions": {"upload": {"href": f"{self.url}/blobs/{entry['oid']}"}}} for entry in objects
            ]
            return {"transfer": "basic", "objects": upload}, 200
        if "/commit/" in path:
            return self._commit(path.removeprefix("/api/models/").split("/commit/")[0], body)
        return {"error": "Not Found"}, 404

    def _create(self, wanted):
        name = f"{wanted.get('organization') or 'someone'}/{wanted['name']}"
        if name in self.refuse_create:
            return {"error": "You don't have the rights to create a model under this namespace"}, 403
        self.created.append(name)
        return {"url": f"{self.url}/{name}", "id": name, "name": name}, 200

    def _store(self, digest, body):
        if hashlib.sha256(body).hexdigest() != digest:
            return {"error": "sha256 differs"}, 400
        self.blobs[digest] = body
        return {}, 200

    def _commit(self, repository, body):
        lines = [json.loads(line) for line in body.decode().splitlines() if line]
        files = self.files.setdefault(repository, {})
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.blobs[value["oid"]]
        summary = next(line["value"]["summary"] for line in lines if line["key"] == "header")
        self.commits.setdefault(repository, []).append(summary)
        return {"success": True, "commitOid": "0" * 40, "commitUrl": f"{self.url}/{repository}/commit/{'0' * 40}"}, 200
