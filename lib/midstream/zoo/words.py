"""Common English words: the vocabulary of the tiny models' tokenizer."""

_FUNCTION = """
a about above across after again against ago ahead all almost alone along already also although always am among an and
another any anybody anyone anything anyway anywhere are around as at away back be because been before behind being
below beside between beyond both but by can cannot could did do does done down during each either else enough even ever
every everybody everyone everything everywhere except far few for former from further had has have he hence her here
hers herself him himself his how however i if in indeed inside instead into is it its itself just last least less like
little many may maybe me might mine more most much must my myself near nearly neither never next no nobody none nor not
nothing now nowhere of off often on once one only onto or other others our ours out outside over own per perhaps quite
rather same several shall she should since so some somebody someone something sometimes somewhere soon still such than
that the their them themselves then there therefore these they this those though through throughout thus to together
too toward towards under unless until up upon us very was we well were what whatever when whenever where whether which
while who whole whom whose why will with within without would yes yet you your yours yourself
"""

_VERBS = """
accept act add admit agree allow answer appear apply argue arrive ask attack avoid become begin believe belong break
bring build burn buy call care carry catch cause change check choose claim clean clear close come compare complain
consider contain continue control cook cost count cover create cross cry cut dance deal decide describe die discover
discuss draw dream dress drink drive drop eat end enjoy enter exist expect explain face fail fall feel fight fill find
finish fix fly follow forget forgive form gather get give go grow guess happen hate hear help hide hit hold hope hurt
imagine improve include increase introduce invite join jump keep kill know laugh lay lead learn leave let lie listen
live look lose love make mark matter mean measure meet mention mind miss move need notice offer open order pass pay
perform pick place plan play point prefer prepare present press prevent produce promise prove provide pull push put
raise reach read realize receive recommend record reduce refuse remain remember remove repeat replace reply report
require rest return ride ring rise run save say see seem sell send serve set settle shake share shine shoot show shut
sing sit sleep smile sound speak spend stand start stay steal stop study suffer suggest support suppose surprise take
talk taste teach tell test thank think throw touch travel treat trust try turn understand use visit vote wait walk want
warn wash waste watch wear win wish wonder work worry write
been began broke brought built bought came caught chose did drank drew drove ate fell felt found flew forgot gave went
grew heard held kept knew laid led left lost made meant met paid ran said sat saw sent shot showed sold spoke spent
stood stole swam taught thought threw told took understood won wore wrote
asking being coming doing getting giving going having looking making playing saying seeing taking talking thinking
trying using waiting walking working watching writing reading running living trying moving growing feeling
asked called helped lived looked loved moved needed played seemed showed started stopped tried turned used walked
wanted watched worked
"""

_NOUNS = """
account actor actress age air animal apple area arm army art article artist attention audience author baby bag ball
bank bar base battery beach beauty bed bird birthday blood board boat body book bottle bottom box boy brain bread
brother budget building business button buyer camera camp capital captain car card case cat cell center century chair
chance chapter character charge chief child children choice church city class clock clothes coach coat coffee color
comedy community company computer condition congress control corner country couple course court cousin cup customer
data date daughter day death debate decade degree design desk detail device dialogue dinner direction director doctor
dog dollar door doubt drama driver drug dust ear earth east economy edge editor editorial education effect effort egg
election emotion energy engine enemy entity environment evening event evidence example experience eye fact factory
family fan farm fashion father fear feature field figure file film fire fish floor flower food foot force forest
friend front fruit fun future game garden gas girl glass god gold government grade grass ground group guitar gun guy
hair half hall hand head health heart heat height hero hill history hole holiday home horror horse hospital hotel hour
house human humor husband ice idea image industry information interest internet island issue item job joke journey
judge key kid kind king kitchen knife knowledge lady lake land language laughter law lawyer leader leg lesson letter
level library life light line lip list location lunch machine magazine mail man manager map market master match
meaning meat media member memory message metal middle milk million minute mistake moment money month moon morning
mother mountain mouth movie murder museum music name nation nature neck neighbor network news newspaper night noise
north nose note novel number object ocean office officer oil opinion page pain paint pair paper parent park part
party past patient pattern peace pen people performance period person phone photo picture piece plane plant plate
player plot poem poet poetry police policy position power president price prison prize problem process product program
project property purpose quality queen question race radio rain reader reason relationship report result review rice
risk river road rock role romance room rule sale salt scene school science scientist screen script sea season seat
second secret sense sentence sentiment sequel series service sex shape ship shirt shoe shop side sign silence silver
sister site size skin sky smoke snow society software soldier son song soul source south space spirit sport spring
stage star state station step stone store storm story street strength student style subject success sugar summer sun
surface system table tale task tea teacher team tear technology telephone television term text theater theory thing
thousand thriller time title today tomorrow tonight tool tooth top topic town toy trade train tree trip trouble truck
truth tweet type uncle unit university user value version victim video view village violence voice war water way
weapon weather website week weekend weight west wife wind window wine winter woman wood word world writer year
yesterday youth
actors books characters children days eyes fans features films friends games hands hours ideas images jokes kids laughs
lines lives men minutes moments months movies parts performances pictures players problems products questions reasons
reviews scenes sources sports stories students things times tweets users viewers weeks women words years
"""

_QUALITIES = """
able abbreviation absurd actual afraid alive amazing american amusing angry annoying awful awkward bad beautiful best
better big bitter black blue bold boring bright brilliant brown busy calm careful charming cheap classic clever cold
comic common complete complex confused cool crazy cruel dark dead dear deep delightful description different difficult
dirty double dramatic dry dull early easy effective emotional empty english entertaining entire equal excellent
exciting expensive fair false familiar famous fast fat fine first flat foreign free fresh full funny gentle gifted glad
good grand gray great green happy hard harsh heavy high honest horrible hot huge important impossible impressive
intelligent interesting international kind large late lazy light local lonely long loud low lovely lucky mad main major
mean mediocre modern moral moving narrow national natural neat negative nervous new nice normal old ordinary original
painful perfect personal physical pleasant political poor popular positive possible powerful predictable pretty private
proud public pure quick quiet rare ready real red rich right romantic rough round sad safe scary serious sharp short
sick silly similar simple slow small smart smooth social soft solid special strange strong stupid subtle sudden sweet
tall tender terrible terrific thick thin tight tired touching true ugly unfunny unusual useful usual vast violent warm
weak weird wet white wide wild wise witty wonderful worse worst worth wrong young
actually badly certainly clearly completely easily especially exactly finally fully generally hardly highly hopefully
immediately likely mainly merely mostly nicely obviously only particularly possibly probably quickly really recently
simply slightly slowly suddenly surely surprisingly truly usually utterly
zero two three four five six seven eight nine ten eleven twelve twenty thirty fifty hundred
monday tuesday wednesday thursday friday saturday sunday january february march april june july august september
october november december america england france germany london paris york washington hollywood
anonymous http url removed lol twitter amazon cinema blog website advertisement
"""

WORDS = tuple(dict.fromkeys((_FUNCTION + _VERBS + _NOUNS + _QUALITIES).split()))

ENDINGS = (
    *("s", "es", "ed", "er", "ers", "est", "ing", "ly", "y", "al", "ally", "ful", "less", "ness", "ment", "ments"),
    *("tion", "tions", "sion", "ation", "able", "ible", "ity", "ous", "ive", "ic", "ical", "ish", "ist", "ism", "ize"),
    *("ence", "ance", "ent", "ant", "ary", "ory", "ure", "age", "ate", "en", "on", "an", "or", "re", "un", "in", "de"),
    *(
        "'s",
        "'t",
        "'re",
        "'ve",
        "'m",
        "'ll",
        "'d",
        "...",
        "th",
        "ch",
        "sh",
        "ck",
        "ll",
        "ss",
        "st",
        "ea",
        "ou",
        "qu",
        "ar",
        "ri",
        "ra",
        "ro",
        "li",
        "la",
        "lo",
        "ti",
        "te",
    ),
)
"""Word parts that shorten the spelling of words that are not listed."""

BEGINNINGS = (
    *"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789",
    *("re", "un", "in", "de", "con", "dis", "pre", "pro", "com", "ex", "im", "en", "over", "sub", "inter", "trans"),
    *("st", "ch", "sh", "th", "tr", "br", "cr", "fr", "gr", "pr", "pl", "cl", "sp", "sc", "sl", "str", "@", "#", "$"),
)
"""How words that are not listed may begin after a space."""
