// How a feed service calls liverank from Node. README shows this file.
const grpc = require("@grpc/grpc-js");
const loader = require("@grpc/proto-loader");

const [protoDir, server] = process.argv.slice(2);
const definition = loader.loadSync("liverank/v1/ranking.proto", { includeDirs: [protoDir], longs: Number });
const { Ranking } = grpc.loadPackageDefinition(definition).liverank.v1;

const client = new Ranking(server, grpc.credentials.createInsecure());
client.rank({ requestId: "node-1", limit: 10 }, { deadline: Date.now() + 5000 }, (error, reply) => {
  if (error) throw error;
  for (const stream of reply.streams) {
    const sources = reply.sourceNames.filter((_, bit) => (stream.sources >> bit) & 1);
    console.log(JSON.stringify({ ...stream, sources }));
  }
});
