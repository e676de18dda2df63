// A real identity provider (npm `oidc-provider`) for the test, and what a person's browser does with it.
//
//   node provider.mjs serve PEOPLE          runs the provider; says its issuer when it is ready. PEOPLE is a JSON file:
//                                           what it says of each login, read anew for every token
//   node provider.mjs browse URL LOGIN      follows the address as a browser would, and fills in the forms
//   node provider.mjs token ISSUER CLIENT LOGIN    prints an ID token, as a CI system would give it to a job

import { createHash, randomBytes } from 'node:crypto';
import { readFileSync } from 'node:fs';
import { createServer } from 'node:http';
import { createRequire } from 'node:module';
import { join } from 'node:path';
import { pathToFileURL } from 'node:url';

const CLAIMS = ['preferred_username', 'name', 'groups', 'repository', 'ref'];

async function serve(people) {
  const modules = createRequire(join(process.env.MODULES, 'index.js'));
  const { default: Provider } = await import(pathToFileURL(modules.resolve('oidc-provider')));
  const server = createServer();
  await new Promise((done) => server.listen(0, '127.0.0.1', done));
  const issuer = `http://127.0.0.1:${server.address().port}`;
  const client = (id, more) => ({
    client_id: id,
    application_type: 'native',
    redirect_uris: ['http://127.0.0.1/callback'],
    grant_types: ['authorization_code'],
    response_types: ['code'],
    token_endpoint_auth_method: 'none',
    ...more,
  });
  const secret = { client_secret: process.env.CLIENT_SECRET, token_endpoint_auth_method: 'client_secret_basic' };
  const provider = new Provider(issuer, {
    clients: [client('nexus'), client('ci'), client('confidential', secret)],
    claims: { openid: ['sub'], profile: CLAIMS },
    // So that the ID token itself says what its scopes allow.
    conformIdTokenClaims: false,
    pkce: { required: () => true },
    async findAccount(_, id) {
      return { accountId: id, claims: async () => ({ sub: id, ...JSON.parse(readFileSync(people))[id] }) };
    },
  });
  server.on('request', provider.callback());
  console.log(issuer);
}

/** Goes where the provider sends a browser, until it leaves the provider. Answers where it was sent then. */
async function follow(start, login) {
  const cookies = new Map();
  const origin = new URL(start).origin;
  let [url, form] = [start, undefined];
  for (let step = 0; step < 20; step += 1) {
    if (new URL(url).origin !== origin) return url;
    const answer = await fetch(url, {
      method: form ? 'POST' : 'GET',
      body: form && new URLSearchParams(form),
      redirect: 'manual',
      headers: { cookie: [...cookies].map(([name, value]) => `${name}=${value}`).join('; ') },
    });
    for (const cookie of answer.headers.getSetCookie()) {
      const [name, value] = cookie.split(';')[0].split('=');
      if (value) cookies.set(name, value);
      else cookies.delete(name);
    }
    const text = await answer.text();
    const next = answer.headers.get('location');
    if (next) {
      [url, form] = [new URL(next, url).href, undefined];
      continue;
    }
    const action = text.match(/<form[^>]* action="([^"]+)"/);
    const prompt = text.match(/name="prompt" value="([^"]+)"/);
    if (!action || !prompt) throw new Error(`${answer.status} ${url}: ${text}`);
    [url, form] = [new URL(action[1], url).href, { prompt: prompt[1], login, password: 'any' }];
  }
  throw new Error('the provider sends the browser round in circles');
}

async function browse(url, login) {
  const answer = await fetch(await follow(url, login));
  console.log(answer.status, await answer.text());
}

async function token(issuer, client, login) {
  const redirect = 'http://127.0.0.1:1/callback';
  const verifier = randomBytes(32).toString('base64url');
  const question = {
    client_id: client,
    response_type: 'code',
    scope: 'openid profile',
    redirect_uri: redirect,
    code_challenge: createHash('sha256').update(verifier).digest('base64url'),
    code_challenge_method: 'S256',
  };
  const back = new URL(await follow(`${issuer}/auth?${new URLSearchParams(question)}`, login));
  const answer = await fetch(`${issuer}/token`, {
    method: 'POST',
    body: new URLSearchParams({
      grant_type: 'authorization_code',
      client_id: client,
      redirect_uri: redirect,
      code: back.searchParams.get('code'),
      code_verifier: verifier,
    }),
  });
  console.log((await answer.json()).id_token);
}

const [verb, ...rest] = process.argv.slice(2);
await { serve, browse, token }[verb](...rest);
