-- A job store with schema version 1, for SQLite and Postgres.
CREATE TABLE clock (
    wall DOUBLE PRECISION NOT NULL,
    running DOUBLE PRECISION NOT NULL,
    settled DOUBLE PRECISION NOT NULL,
    jobs BIGINT NOT NULL,
    claims BIGINT NOT NULL
);
INSERT INTO clock VALUES (0, 0, 0, 0, 0);
CREATE TABLE jobs (
    number BIGINT PRIMARY KEY,
    id TEXT NOT NULL UNIQUE,
    owner TEXT NOT NULL,
    bundle TEXT NOT NULL,
    shape TEXT NOT NULL,
    steps BIGINT NOT NULL,
    request TEXT NOT NULL,
    priority BIGINT NOT NULL,
    objects TEXT NOT NULL,
    batch TEXT,
    line BIGINT,
    state TEXT NOT NULL,
    queued DOUBLE PRECISION NOT NULL,
    place DOUBLE PRECISION NOT NULL,
    worker TEXT,
    attempt BIGINT NOT NULL DEFAULT 0,
    lost BIGINT NOT NULL DEFAULT 0,
    began DOUBLE PRECISION,
    ended DOUBLE PRECISION,
    lease_until DOUBLE PRECISION,
    cancel_requested BIGINT NOT NULL DEFAULT 0,
    stage TEXT,
    progress BIGINT NOT NULL DEFAULT 0,
    created_at DOUBLE PRECISION NOT NULL,
    started_at DOUBLE PRECISION,
    completed_at DOUBLE PRECISION,
    expires_at DOUBLE PRECISION,
    result TEXT,
    error TEXT,
    events BIGINT NOT NULL DEFAULT 0
);
CREATE INDEX jobs_of_batch ON jobs (batch, state);
CREATE INDEX jobs_of_owner ON jobs (owner, number);
CREATE INDEX jobs_by_lease ON jobs (state, lease_until);
CREATE INDEX jobs_by_end ON jobs (state, completed_at);
CREATE INDEX jobs_by_expiry ON jobs (state, expires_at);
CREATE TABLE events (
    job TEXT NOT NULL,
    sequence BIGINT NOT NULL,
    created_at DOUBLE PRECISION NOT NULL,
    kind TEXT NOT NULL,
    data TEXT NOT NULL,
    PRIMARY KEY (job, sequence)
);
CREATE INDEX events_by_age ON events (created_at);
CREATE TABLE owners (
    owner TEXT PRIMARY KEY,
    served BIGINT NOT NULL DEFAULT 0,
    quota TEXT
);
CREATE TABLE batches (id TEXT PRIMARY KEY, owner TEXT NOT NULL, created_at DOUBLE PRECISION NOT NULL);
CREATE TABLE idempotency (
    owner TEXT NOT NULL,
    key TEXT NOT NULL,
    digest TEXT NOT NULL,
    job TEXT NOT NULL,
    created_at DOUBLE PRECISION NOT NULL,
    PRIMARY KEY (owner, key)
);
CREATE INDEX idempotency_of_job ON idempotency (job);
CREATE TABLE objects (name TEXT NOT NULL, job TEXT NOT NULL, PRIMARY KEY (name, job));
CREATE INDEX objects_of_job ON objects (job);
CREATE TABLE removals (name TEXT PRIMARY KEY);
CREATE TABLE api_keys (
    id TEXT PRIMARY KEY,
    owner TEXT NOT NULL,
    hash TEXT NOT NULL,
    scopes TEXT NOT NULL,
    created_at DOUBLE PRECISION NOT NULL,
    revoked_at DOUBLE PRECISION
);
CREATE TABLE schema_version (version BIGINT NOT NULL);
INSERT INTO schema_version VALUES (1);
UPDATE clock SET wall = 1700000000, running = 500, settled = 0, jobs = 3, claims = 1;
INSERT INTO owners (owner, served) VALUES ('ann', 1);
INSERT INTO jobs (number, id, owner, bundle, shape, steps, request, priority, objects, state, queued, place, worker, attempt,
    began, ended, progress, created_at, started_at, completed_at, expires_at, result, events)
    VALUES (0, 'video_done', 'ann', 'bundle-1', '832x480x81', 4, '{"prompt":"a red circle"}', 0, '["picture.png"]',
    'completed', 400, 400, 'w0', 1, 410, 422.5, 100, 1699999900, 1699999910, 1699999922, 1700086322,
    '{"objects":{"video":"done.mp4"},"backend":"trt","details":{"seed":7}}', 3);
INSERT INTO jobs (number, id, owner, bundle, shape, steps, request, priority, objects, state, queued, place, created_at, events)
    VALUES (1, 'video_first', 'ann', 'bundle-1', '832x480x81', 4, '{}', 0, '[]', 'queued', 450, 450, 1699999950, 1);
INSERT INTO jobs (number, id, owner, bundle, shape, steps, request, priority, objects, state, queued, place, created_at, events)
    VALUES (2, 'video_urgent', 'ann', 'bundle-1', '832x480x81', 4, '{}', 2, '[]', 'queued', 460, 340, 1699999960, 1);
INSERT INTO objects (name, job) VALUES ('picture.png', 'video_done');
INSERT INTO objects (name, job) VALUES ('done.mp4', 'video_done');
INSERT INTO events VALUES ('video_done', 1, 1699999900, 'queued', '{}');
INSERT INTO events VALUES ('video_done', 2, 1699999910, 'started', '{"progress":0,"attempt":1}');
INSERT INTO events VALUES ('video_done', 3, 1699999922, 'completed', '{"progress":100}');
INSERT INTO events VALUES ('video_first', 1, 1699999950, 'queued', '{}');
INSERT INTO events VALUES ('video_urgent', 1, 1699999960, 'queued', '{}');
INSERT INTO idempotency VALUES ('ann', 'k', 'digest', 'video_first', 1699999950);
