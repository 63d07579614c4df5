// The whole contract from a second language: publish, rank, check, watch, errors. Prints one line of JSON.
const grpc = require("@grpc/grpc-js");
const loader = require("@grpc/proto-loader");

const [protoDir, server, startedMs] = process.argv.slice(2);
const files = ["ranking", "ingest", "liveness", "admin"].map((name) => `liverank/v1/${name}.proto`);
const definition = loader.loadSync(files, { includeDirs: [protoDir], longs: Number, enums: String, defaults: true });
const { Ranking, Ingest, Liveness, Admin } = grpc.loadPackageDefinition(definition).liverank.v1;
const secure = grpc.credentials.createInsecure();
const at = Number(startedMs);

const call = (client, method, request) =>
  new Promise((resolve) =>
    client[method](request, { deadline: Date.now() + 10000 }, (error, reply) =>
      resolve(error ? { code: grpc.status[error.code], details: error.details } : reply)
    )
  );

async function main() {
  const ranking = new Ranking(server, secure);
  const liveness = new Liveness(server, secure);
  const admin = new Admin(server, secure);
  const publish = new Ingest(server, secure).publish();
  const acks = publish[Symbol.asyncIterator]();
  const send = async (events) => {
    publish.write({ producerId: "node", events });
    return (await acks.next()).value;
  };
  const watch = liveness.watchEnded({});
  await new Promise((resolve) => watch.once("metadata", resolve));
  const ends = watch[Symbol.asyncIterator]();

  const result = {};
  result.ack = await send([
    { sequence: 1, streamId: "node-a", epoch: 7, eventTimeMs: at, started: { creatorId: "c", title: "Grüße 日本" } },
    { sequence: 2, streamId: "node-b", epoch: 1, eventTimeMs: at, started: { creatorId: "d" } },
    { sequence: 3, streamId: "nobody", eventTimeMs: at, liked: {} },
    { sequence: 4, streamId: "node-a", eventTimeMs: at, purchased: { amountMinor: 1999, currency: "EUR" } },
  ]);
  do {
    result.ranked = await call(ranking, "rank", { requestId: "n", limit: 5, minOffset: result.ack.offset });
  } while (result.ranked.streams && result.ranked.streams.length < 2); // new streams await their first tick
  result.end = await send([{ sequence: 5, streamId: "node-b", epoch: 1, eventTimeMs: at, ended: { reason: "bye" } }]);
  result.heard = (await ends.next()).value;
  result.after = await call(ranking, "rank", { limit: 5 });
  result.checked = await call(liveness, "checkLive", { streams: [{ streamId: "node-a" }, { streamId: "node-b" }] });
  result.batch = await call(ranking, "rankBatch", { requests: [{ requestId: "x" }, { requestId: "y" }] });
  result.explained = await call(ranking, "explain", { request: {}, streamId: "node-b" });
  result.status = await call(admin, "status", {});
  result.refused = await call(ranking, "rank", { viewerEmbedding: [1, 2] });
  watch.on("error", () => {});
  watch.cancel();
  publish.end();
  console.log(JSON.stringify(result));
}

main();
