"""Which store an s3:// location means, its client, and what its refusals mean to a user.

A location is `s3://bucket/prefix`, and may say how the store is reached: `s3://bucket/prefix?endpoint_url=https://...`
with the keys of `Store`, joined by `&`. What it leaves out comes from the usual places of the AWS tools
(AWS_ENDPOINT_URL, AWS_REGION, AWS_PROFILE, AWS_ACCESS_KEY_ID, ~/.aws/config, roles of the machine); keys and secrets
come from there only.
"""

import dataclasses
import difflib
import functools
import os
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl, urlsplit

SCHEME = "s3://"
CONNECT_TIMEOUT_SECONDS = 5
READ_TIMEOUT_SECONDS = 10  # without a byte


class LocationError(ValueError):
    """What should be a location cannot be one; the message says why and what can."""


@dataclass(frozen=True)
class Store:
    """How a store is reached; None leaves it to the AWS variables and files."""

    endpoint_url: str | None = None  # http(s)://host[:port] of a store that is not AWS
    region: str | None = None
    profile: str | None = None  # of ~/.aws/config and ~/.aws/credentials
    addressing_style: str | None = None  # path: endpoint/bucket/key; virtual: bucket.endpoint/key
    anonymous: bool = False  # sends no credentials


@dataclass(frozen=True)
class S3Location:
    """A location taken apart."""

    store: Store
    bucket: str
    prefix: str

    def key(self, name: str) -> str:
        """Key of the object `name`."""
        return f"{self.prefix}/{name}" if self.prefix else name

    def address(self, name: str) -> str:
        """The object `name` for messages."""
        return f"{SCHEME}{self.bucket}/{self.key(name)}"


@functools.cache
def parse(location: str) -> S3Location:
    """Takes `s3://bucket/prefix?key=value&...` apart; a LocationError names what is wrong with it."""
    parts = urlsplit(location, allow_fragments=False)
    if not parts.netloc:
        raise LocationError(f"{location}: expected s3://bucket/prefix, got no bucket")
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    known = [field.name for field in dataclasses.fields(Store)]
    for key, value in options.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            hint = f"did you mean {near[0]}?" if near else f"the keys are {', '.join(known)}"
            raise LocationError(f"{location}: unknown key {key} after `?`; {hint}")
        allowed = {"addressing_style": ("path", "virtual"), "anonymous": ("true", "false")}.get(key)
        if not value or (allowed and value not in allowed):
            raise LocationError(f"{location}: {key} must be {' or '.join(allowed or ('a text',))}, got {value!r}")
    if not options.get("endpoint_url", "http://").startswith(("http://", "https://")):
        raise LocationError(f"{location}: endpoint_url must begin with http:// or https://")
    store = Store(**{**options, "anonymous": options.get("anonymous") == "true"})  # type: ignore[arg-type]  # checked above
    return S3Location(store, parts.netloc, parts.path.strip("/"))


def endpoint(where: S3Location) -> str:
    """URL of the store, wherever it was named."""
    return str(client(where).meta.endpoint_url)


def client(where: S3Location, attempts: int = 1) -> Any:
    """This process's client: one that was made before a fork is of no use in the child."""
    return client_of(os.getpid(), where.store, attempts)


@functools.cache
def client_of(pid: int, store: Store, attempts: int) -> Any:
    """A boto3 client that sends each request up to `attempts` times."""
    import boto3
    import botocore
    from botocore.config import Config

    options: dict[str, Any] = {"signature_version": botocore.UNSIGNED if store.anonymous else "s3v4"}
    if store.addressing_style:  # botocore's own choice: path for a custom endpoint, virtual for AWS
        options["s3"] = {"addressing_style": store.addressing_style}
    if store.endpoint_url or {"AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"} & os.environ.keys():
        # Stores other than AWS may know no checksums; ours are the sha256 of the manifest.
        options["request_checksum_calculation"] = options["response_checksum_validation"] = "when_required"
    config = Config(
        retries={"mode": "standard", "total_max_attempts": attempts},
        max_pool_connections=32,
        connect_timeout=CONNECT_TIMEOUT_SECONDS,
        read_timeout=READ_TIMEOUT_SECONDS,
        tcp_keepalive=True,
        **options,
    )
    session = boto3.session.Session(profile_name=store.profile, region_name=store.region)
    return session.client("s3", endpoint_url=store.endpoint_url, config=config)


# What a store may say, and what then is to be checked.
_REFUSALS = {
    "InvalidAccessKeyId": "the store does not know the access key; check AWS_ACCESS_KEY_ID or the profile",
    "SignatureDoesNotMatch": "the secret key is wrong; check AWS_SECRET_ACCESS_KEY or the profile",
    "ExpiredToken": "the credentials have expired; get new ones",
    "InvalidToken": "the session token is wrong; check AWS_SESSION_TOKEN or the profile",
    "RequestTimeTooSkewed": "this machine's clock is wrong; set it",
}
_TRANSIENT_CODES = {"RequestTimeout", "RequestTimeoutException", "SlowDown", "Throttling", "ThrottlingException"}
_TRANSIENT_STATUS = {408, 429, 500, 502, 503, 504}


def final_error(error: BaseException, where: S3Location, name: str) -> OSError | None:
    """What to tell the user of a failure that another attempt would not mend; None for one that it may."""
    from botocore import exceptions
    from botocore.parsers import ResponseParserError

    address = where.address(name)
    if isinstance(error, exceptions.ClientError):
        return _refusal(error, where, address)
    if isinstance(error, exceptions.SSLError) and "CERTIFICATE_VERIFY_FAILED" in str(error):
        return OSError(f"{address}: {error}; name the certificates to trust in AWS_CA_BUNDLE")
    credentials = (
        exceptions.NoCredentialsError,
        exceptions.PartialCredentialsError,
        exceptions.CredentialRetrievalError,
        exceptions.ProfileNotFound,
        exceptions.TokenRetrievalError,
        exceptions.SSOError,
    )
    if isinstance(error, credentials):
        return PermissionError(
            f"{address}: {error}; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, choose a profile (AWS_PROFILE, or "
            f"?profile=NAME after the location), or read a public bucket with ?anonymous=true"
        )
    passing = (
        exceptions.ConnectionError,
        exceptions.HTTPClientError,
        exceptions.IncompleteReadError,
        ResponseParserError,
    )
    if isinstance(error, exceptions.BotoCoreError) and not isinstance(error, passing):
        return OSError(f"{address}: {error}; check bucket, region and endpoint")
    return None


def _refusal(error: Any, where: S3Location, address: str) -> OSError | None:
    code, status = error_code(error), error.response["ResponseMetadata"]["HTTPStatusCode"]
    said = f"{code}: {error.response['Error'].get('Message') or 'no message'}"
    if code in _TRANSIENT_CODES or (status in _TRANSIENT_STATUS and code not in _REFUSALS):
        return None
    if code == "NoSuchBucket":
        return FileNotFoundError(
            f"{address}: there is no bucket {where.bucket} at {endpoint(where)}; check its name and the endpoint"
        )
    if status == 404:
        return FileNotFoundError(f"{address}: not found; check the prefix, or upload the set again")
    if code in _REFUSALS:
        return PermissionError(f"{address}: {_REFUSALS[code]} ({said})")
    if status in (401, 403):
        who = "requests without credentials (anonymous)" if where.store.anonymous else "these credentials"
        return PermissionError(
            f"{address}: the store does not allow this to {who}; check credentials, profile and the rights to the "
            f"bucket (reading needs s3:GetObject and s3:ListBucket, uploading s3:PutObject, building also "
            f"s3:DeleteObject) ({said})"
        )
    if status == 412:
        return changed(address)
    return OSError(f"{address}: {said} (status {status}); check bucket, region and endpoint")


def error_code(error: Any) -> str:
    """What a store calls its refusal (a botocore ClientError), such as NoSuchKey."""
    return str(error.response["Error"].get("Code", "unknown"))


def changed(address: str) -> OSError:
    """The error of a read that finds another version of the object than it began with."""
    return OSError(f"{address}: was replaced while it was read; open the set again")
